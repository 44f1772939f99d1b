"""The report's style sheet: a light and a dark palette, one column on a narrow screen."""

# On a light page, and on a dark one.
PALETTE = {
    "page": ("#fcfcfa", "#14171a"),
    "card": ("#ffffff", "#1b1f23"),
    "ink": ("#1c2024", "#e8eaed"),
    "soft": ("#565d66", "#a8afb8"),
    "rule": ("#dcdfe3", "#343a41"),
}
LIGHT, DARK = ({name: pair[k] for name, pair in PALETTE.items()} for k in (0, 1))


def sheet() -> str:
    """The CSS of the page."""
    dark = f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    return f":root{{color-scheme:light dark;{_variables(LIGHT)}}}{dark}{_RULES}"


def _variables(palette: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in palette.items())


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;font-weight:650;letter-spacing:-.01em;
overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:44px 0 6px;font-weight:650}
h3{font-size:.9rem;margin:0 0 6px;font-weight:600;overflow-wrap:anywhere}
h4{font-size:.82rem;margin:0 0 2px;font-weight:600}
p{margin:0 0 12px;max-width:70ch}
.soft,figcaption{color:var(--soft)}
figcaption{font-size:.8rem;line-height:1.4;margin-top:4px}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.92em;
overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:8px 28px;margin:18px 0 0;padding:14px 0;
border-top:1px solid var(--rule);border-bottom:1px solid var(--rule)}
dt{font-size:.75rem;color:var(--soft)}
dd{margin:0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:0 0 14px;
font-size:.85rem}
.swatch{display:inline-block;width:11px;height:11px;margin-right:7px;border-radius:2px;
vertical-align:-.5px}
.grid-of{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));
gap:24px 32px}
.grid-of>*{min-width:0}
.note{font-size:.85rem}
.whole,.size{white-space:nowrap}
.size{font-weight:400;font-size:.82rem;margin-left:6px}
figure{margin:0}
svg{display:block;width:100%;max-width:420px;height:auto;overflow:visible}
svg text{font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;position:relative;margin:0 0 12px}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:6px 14px 6px 0;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--rule)}
th{font-weight:600}
thead th{color:var(--soft);font-size:.78rem;font-weight:500;vertical-align:bottom}
th:first-child,.text{text-align:left}
th.name{white-space:normal;overflow-wrap:anywhere;min-width:9em;max-width:20em}
details{border-top:1px solid var(--rule)}
details:last-of-type{border-bottom:1px solid var(--rule)}
summary{cursor:pointer;padding:11px 0;display:flex;flex-wrap:wrap;gap:2px 16px;
align-items:baseline;list-style:none}
summary::-webkit-details-marker{display:none}
summary::before{content:"+";color:var(--soft);width:.8em;flex:none;font-weight:600}
details[open]>summary::before{content:"−"}
summary:focus-visible{outline:2px solid var(--soft);outline-offset:2px}
summary .title{font-weight:600;overflow-wrap:anywhere;min-width:0}
summary .soft{font-size:.85rem;font-variant-numeric:tabular-nums}
details>.grid-of{padding:8px 0 26px}
.maps{grid-column:1/-1;display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));
gap:18px 22px}
.map{width:100%;max-width:190px}
.map img{display:block;width:100%;aspect-ratio:1;image-rendering:pixelated;
border:1px solid var(--rule);background:var(--card)}
.scale{display:inline-block;width:120px;height:10px;vertical-align:-1px;margin:0 6px;
border:1px solid var(--rule);
background:linear-gradient(90deg,rgb(208,90,46),transparent,rgb(47,111,196))}
@media (max-width:560px){main{padding:24px 16px 48px}h1{font-size:1.4rem}}
@media print{details>*{display:block}summary::before{content:""}}
"""
