"""The engine on a virtual clock: the same code, on devices that only count and take the time that is predicted."""
