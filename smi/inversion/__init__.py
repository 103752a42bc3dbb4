"""The inversion loop: settings, schedules, losses, importance, augmentation, one step."""
