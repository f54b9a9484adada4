"""The report of a run: one HTML page that opens from disk, made of JSON files and the pictures that they name.

When: AFTER an evaluation, by `vlmdet report`; no torch, and no figure is computed here.

    reading.py    finds and reads what a run left        verdict.py   the sentence, and what the figures are of
    tables.py     figures, classes, sizes, confusion     charts.py    histograms and curves as SVG
    pictures.py   thumbnails                             gallery.py   a card per picture, boxes as SVG
    album.py      divides the cards among pages          page.py       puts them together; report.css, report.js
"""

from vlmdet.report.page import write_report

__all__ = ["write_report"]
