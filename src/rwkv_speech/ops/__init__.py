"""The WKV-6 operator: its definition, its portable form, its registration."""
