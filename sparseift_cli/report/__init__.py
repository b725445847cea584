"""From run directories to an answer: collect, compare, draw. Nothing here imports torch."""
