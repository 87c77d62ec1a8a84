"""Trainer classes for nnU-Net.

Every module here has a name that is unique in the world: nnU-Net may import it without the package.
"""
