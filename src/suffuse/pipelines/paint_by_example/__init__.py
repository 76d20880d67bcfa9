"""A picture painted where its mask is white, as an example shows (Yang et al., 2022, "Paint by Example")."""
