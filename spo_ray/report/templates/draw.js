for (const figure of document.querySelectorAll('.figure')) {
  const spec = JSON.parse(figure.querySelector('script').textContent);
  const room = figure.clientWidth - 60;
  if (spec.facet) spec.columns = Math.max(1, Math.min(spec.columns, Math.floor(room / 250)));
  else if (!spec.usermeta && spec.width > room) spec.width = Math.max(200, room);
  vegaEmbed(figure.querySelector('div'), spec, {renderer: 'svg', actions: false});
}
