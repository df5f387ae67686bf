"""How closely control maps are followed: on scenes of known layout, and with concepts of `customize train`."""
