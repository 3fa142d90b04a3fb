"""How the app looks: Gradio's theme on top of the colours in ``assets/style.css``.

The palette is there, once for light and once for dark; the theme only says which colour goes
where, so both themes are one list.
"""

from inspect import signature
from pathlib import Path

import gradio as gr
from gradio.themes.utils import fonts

_ASSETS = Path(__file__).parent / "assets"

# Where the variables of style.css go. A name that ends in _dark takes the value of its twin.
_TOKENS = {
    "body_background_fill": "var(--page)",
    "body_text_color": "var(--ink)",
    "body_text_color_subdued": "var(--muted)",
    "background_fill_primary": "var(--card)",
    "background_fill_secondary": "var(--inset)",
    "border_color_primary": "var(--line)",
    "border_color_accent": "var(--accent)",
    "color_accent_soft": "var(--accent-soft)",
    "link_text_color": "var(--accent-ink)",
    "link_text_color_hover": "var(--accent-ink)",
    "link_text_color_active": "var(--accent-ink)",
    "link_text_color_visited": "var(--accent-ink)",
    "code_background_fill": "var(--inset)",
    "block_background_fill": "transparent",
    "block_border_color": "var(--line)",
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_info_text_color": "var(--muted)",
    "block_info_text_size": "12px",
    "block_label_background_fill": "transparent",
    "block_label_border_width": "0px",
    "block_label_text_color": "var(--muted)",
    "block_padding": "0px",
    "block_radius": "10px",
    "block_title_text_color": "var(--ink)",
    "block_title_text_size": "13px",
    "block_title_text_weight": "600",
    "container_radius": "10px",
    "form_gap_width": "0px",
    "layout_gap": "14px",
    "panel_background_fill": "transparent",
    "panel_border_width": "0px",
    "section_header_text_weight": "600",
    "accordion_text_color": "var(--ink)",
    "table_text_color": "var(--ink)",
    "table_border_color": "var(--line)",
    "table_even_background_fill": "var(--card)",
    "table_odd_background_fill": "var(--card)",
    "table_row_focus": "var(--accent-soft)",
    "checkbox_background_color": "var(--field)",
    "checkbox_background_color_hover": "var(--field)",
    "checkbox_background_color_focus": "var(--field)",
    "checkbox_background_color_selected": "var(--accent)",
    "checkbox_border_color": "var(--line-strong)",
    "checkbox_border_color_hover": "var(--accent)",
    "checkbox_border_color_focus": "var(--accent)",
    "checkbox_border_color_selected": "var(--accent)",
    "checkbox_label_background_fill": "transparent",
    "checkbox_label_background_fill_hover": "transparent",
    "checkbox_label_background_fill_selected": "transparent",
    "checkbox_label_border_width": "0px",
    "checkbox_label_padding": "0px",
    "checkbox_label_shadow": "none",
    "checkbox_label_text_color": "var(--ink)",
    "checkbox_label_text_color_selected": "var(--ink)",
    "checkbox_shadow": "none",
    "error_background_fill": "var(--bad-soft)",
    "error_border_color": "var(--bad-line)",
    "error_text_color": "var(--bad)",
    "error_icon_color": "var(--bad)",
    "input_background_fill": "var(--field)",
    "input_background_fill_focus": "var(--field)",
    "input_background_fill_hover": "var(--field)",
    "input_border_color": "var(--line-strong)",
    "input_border_color_focus": "var(--accent)",
    "input_border_color_hover": "var(--line-strong)",
    "input_border_width": "1px",
    "input_padding": "9px 11px",
    "input_placeholder_color": "var(--faint)",
    "input_radius": "8px",
    "input_shadow": "none",
    "input_shadow_focus": "0 0 0 3px var(--ring)",
    "input_text_size": "14px",
    "loader_color": "var(--accent)",
    "slider_color": "var(--accent)",
    "stat_background_fill": "var(--accent)",
    "button_large_radius": "8px",
    "button_large_padding": "9px 18px",
    "button_large_text_size": "14px",
    "button_large_text_weight": "600",
    "button_medium_radius": "8px",
    "button_medium_padding": "7px 14px",
    "button_medium_text_size": "13px",
    "button_medium_text_weight": "600",
    "button_small_radius": "8px",
    "button_small_padding": "5px 11px",
    "button_small_text_size": "13px",
    "button_small_text_weight": "600",
    "button_primary_background_fill": "var(--accent)",
    "button_primary_background_fill_hover": "var(--accent-strong)",
    "button_primary_border_color": "var(--accent)",
    "button_primary_border_color_hover": "var(--accent-strong)",
    "button_primary_text_color": "#ffffff",
    "button_primary_text_color_hover": "#ffffff",
    "button_primary_shadow": "none",
    "button_primary_shadow_hover": "none",
    "button_secondary_background_fill": "var(--card)",
    "button_secondary_background_fill_hover": "var(--inset)",
    "button_secondary_border_color": "var(--line-strong)",
    "button_secondary_border_color_hover": "var(--line-strong)",
    "button_secondary_text_color": "var(--ink)",
    "button_secondary_text_color_hover": "var(--ink)",
    "button_secondary_shadow": "none",
    "button_secondary_shadow_hover": "none",
    "button_cancel_background_fill": "var(--bad-soft)",
    "button_cancel_background_fill_hover": "var(--bad-soft)",
    "button_cancel_border_color": "var(--bad-line)",
    "button_cancel_border_color_hover": "var(--bad)",
    "button_cancel_text_color": "var(--bad)",
    "button_cancel_text_color_hover": "var(--bad)",
    "button_cancel_shadow": "none",
    "button_cancel_shadow_hover": "none",
}


def theme() -> gr.themes.Base:
    """The theme; its fonts come with Gradio and are served from this machine."""
    base = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="gray",
        # The file that Gradio has for weight 600 lacks the Latin letters.
        font=[fonts.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
        font_mono=[fonts.LocalFont("IBM Plex Mono", weights=(400,)), "ui-monospace", "monospace"],
    )
    known = signature(base.set).parameters
    twins = {f"{name}_dark": value for name, value in _TOKENS.items() if f"{name}_dark" in known}
    return base.set(**_TOKENS, **twins)


def head() -> str:
    """The style sheet and the script, for the head of the page.

    Gradio rewrites style sheets that it is given as such, and loses rules for narrow pages.
    """
    style = (_ASSETS / "style.css").read_text(encoding="utf-8")
    scripts = [(_ASSETS / name).read_text(encoding="utf-8") for name in ("page.js", "chart.js")]
    return (
        '<meta name="color-scheme" content="light dark">'
        f"<style>{style}</style><script>{''.join(scripts)}</script>"
    )
