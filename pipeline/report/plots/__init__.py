"""Plots as inline SVG.

In: figures. Out: the text of an `<svg>` element with its title and description. Start with `svg.new_axes`.
"""
