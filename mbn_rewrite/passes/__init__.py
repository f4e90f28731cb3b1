"""Passes over the intermediate representation: what becomes of every BatchNormalization."""
