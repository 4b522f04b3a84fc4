"""The reference, our PyTorch path: conversions are traced from it and compared with it."""
