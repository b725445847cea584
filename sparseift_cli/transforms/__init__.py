"""The plan becomes a network: edits to a module, the members that replace layers, their weights and masks, and the proof."""
