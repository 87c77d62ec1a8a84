"""What predictions are worth: Dice per label and pictures."""
