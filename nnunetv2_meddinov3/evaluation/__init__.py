"""What predictions are worth: Dice, pictures, reports."""
