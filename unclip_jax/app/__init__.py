"""The web page: `unclip app`. Needs the extra `app`, which installs gradio.

    worker   the one queue in front of the device
    inputs   what people type and upload, checked
    tasks    what each tab draws, with `pipeline` and `manipulate`
    results  pictures, grid and GIF as files, and the command that draws them again
    store    the folder that they lie in, from which what is old goes
    gate     which requests reach gradio at all
    look     colours, and the page's own bits of HTML
    page     the layout, and what a click does

Only `page`, `widgets` and `serve` import gradio; everything else is tested without it.
"""

import os

# Gradio reads this when it is imported: it shall send nothing to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
