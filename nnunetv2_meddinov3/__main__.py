"""``python -m nnunetv2_meddinov3 VERB`` does what ``meddinov3 VERB`` does."""

import sys

from nnunetv2_meddinov3.cli import main

if __name__ == "__main__":
    sys.exit(main())
