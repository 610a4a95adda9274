"""The bundled world: the small model that ships with freres, and the clips it is shown."""
