"""The guide as a site: pages made from configuration files, source text and cards, and the HTML that mkdocs makes of them."""
