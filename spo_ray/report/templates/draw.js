const sections = [...document.querySelectorAll('h2')];
if (sections.length > 2) {
  const nav = document.createElement('nav');
  nav.setAttribute('aria-label', 'Sections');
  sections.forEach((section, i) => {
    section.id = `section-${i + 1}`;
    nav.append(Object.assign(document.createElement('a'), {href: `#${section.id}`, textContent: section.textContent}));
  });
  sections[0].before(nav);
}
for (const figure of document.querySelectorAll('.figure')) {
  const spec = JSON.parse(figure.querySelector('script').textContent);
  const room = figure.clientWidth || document.querySelector('h1').clientWidth;  // 0 in a closed <details>
  if (spec.facet) {
    spec.columns = Math.max(1, Math.min(spec.columns, Math.floor((room - 60) / 140)));
    spec.spec.width = Math.floor((room - 60) / spec.columns) - (spec.resolve.scale ? 56 : 22);
  } else if (!spec.usermeta) {
    spec.width = Math.min(spec.width || 720, room);
    spec.autosize = {type: 'fit-x', contains: 'padding'};
  }
  vegaEmbed(figure.querySelector('div'), spec, {renderer: 'svg', actions: false});
}
const [filter, search] = document.querySelectorAll('#filter, #search');
const show = () => {
  const samples = [...document.querySelectorAll('.sample')];
  for (const sample of samples) {
    const fits = !filter.value || sample.dataset.moves.split(' ').includes(filter.value);
    sample.hidden = !fits || !sample.textContent.toLowerCase().includes(search.value.toLowerCase());
  }
  document.querySelector('#found').textContent = `${samples.filter(sample => !sample.hidden).length} shown`;
};
for (const control of [filter, search]) control?.addEventListener('input', show);
