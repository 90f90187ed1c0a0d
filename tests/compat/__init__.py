"""Tests with other SAE codebases. A package, so that its conftest is not mistaken for the one that tests import."""
