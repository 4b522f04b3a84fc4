"""The PyTorch path: what a conversion is traced from and measured against."""
