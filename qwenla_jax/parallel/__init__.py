"""Device meshes, shardings, processes."""
