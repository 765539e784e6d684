"""Surviving what fails: steps that raise, devices that raise, hang or die."""
