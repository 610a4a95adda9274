"""The bundled world: clips with known answers, and the small model that ships with freres and is trained on them."""
