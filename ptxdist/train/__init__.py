"""Stores in, weights and counts out: torch, torchvision, albumentations; never ray."""
