"""Every picture of a report, as matplotlib figures and as SVG and PNG files."""
