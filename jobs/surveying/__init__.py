"""What the survey of torchvision's networks is made of."""
