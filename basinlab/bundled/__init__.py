"""The bundled world, where the truth is known: its checkpoints judged, and every mitigation compared on them."""
