"""How a report looks: one column on a phone, two of figures on a screen, light or dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --paper: #fff; --line: #d5d9de; --soft: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #14171a; --line: #3a4148; --soft: #1d2226 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
main { max-width: 78rem; margin: 0 auto; padding: 1.5rem clamp(0.75rem, 3vw, 2rem) 3rem }
h1 { font-size: 1.5rem; margin: 0 0 1rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.75rem; border-bottom: 1px solid var(--line); text-align: right }
th { font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td:nth-child(2):last-child { text-align: left }
td:not(:first-child):not(:last-child), td:nth-child(3) ~ td { white-space: nowrap }
.figures { display: grid; gap: 1.5rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)) }
figure { margin: 0; padding: 0.5rem; background: var(--soft); border-radius: 6px }
figure svg { display: block; width: 100%; height: auto; font-family: inherit }
summary { cursor: pointer; margin-top: 1rem }
pre { overflow-x: auto; background: var(--soft); padding: 0.75rem; border-radius: 6px }
"""
