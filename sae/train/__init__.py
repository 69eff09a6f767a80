"""Training grids of SAEs from one stream of activations."""
