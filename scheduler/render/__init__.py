"""Plans and timelines for people: text, Gantt boxes, figures."""
