"""Closed-form repair of a fused model."""
