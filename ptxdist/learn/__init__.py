"""Stores in, weights and numbers out: torch, torchvision, albumentations; never ray."""
