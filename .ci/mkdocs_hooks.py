"The hooks of mkdocs.yml, explained in nbs/12_website.ipynb. MkDocs loads a hook as a lone file, which a module of a package is not."
from daclip_repro.website import on_config, on_files, on_page_content

__all__ = ["on_config", "on_files", "on_page_content"]
