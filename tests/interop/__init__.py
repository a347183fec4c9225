"""Other programs read what sdlab writes: `make test-interop`."""
