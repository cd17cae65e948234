"""The demo and the measurements: this package against the usual way of prefix tuning."""
