"""The energy-performance surface that all planning sees: measured points, fitted curves. Pure."""
