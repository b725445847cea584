"""Masks as bipartite graphs: how well they connect a layer, now (`gaps`) and over a run (`history`, `spectra`)."""
