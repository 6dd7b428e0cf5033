"""Python runs this at its start when the folder is on PYTHONPATH: see ``torchvision_ops``."""

import torchvision_ops

torchvision_ops.install()
