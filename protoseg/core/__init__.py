"""The method: prototypes, clustering, losses, pixel contrast. Needs torch alone; read `reference` first."""
