"""What every other package rests on: text, files, randomness, registries. Imports errors only."""
