"""From a name on the command line to a dense model: the zoo, libraries, checkpoints, your own callables."""
