"""Our trainers for ``nnUNet_extTrainer=$(meddinov3 ext-path)``, where no start-up file is read.

nnU-Net scans the folder of this file, asks this module for the trainer by name, and forgets the
module again. The file stands in a folder of its own, because whatever else lay beside it would be
imported under a second name.
"""

from nnunetv2_meddinov3.discovery import resolve as __getattr__  # noqa: F401 (PEP 562: nnU-Net asks by name)
