"""The demo: train on a real model and real text, and compare with naive prefix tuning."""
