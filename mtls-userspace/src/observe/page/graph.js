
// Edges in, an SVG out. What is pointed at is described below it.

const DRAWN = 150;
const SMALLEST = 0.7;

const graph = { focus: null, shown: '', volumes: new Map() };

function drawGraph({ edges, edges_total: total, overflowed }) {
  const drawn = edges.slice(0, DRAWN).map((edge) => ({
    ...edge, from: key(edge.source, 'from'), to: key(edge.destination, 'to'),
  }));
  const place = byId('graph');
  const width = place.clientWidth;
  const shown = JSON.stringify([width, drawn]);
  if (shown === graph.shown) return;
  graph.shown = shown;
  if (!drawn.length) {
    place.replaceChildren(make('div', { class: 'empty' }, make('b', {}, 'No connections yet'),
      'Workloads appear here as soon as one of this node speaks or is spoken to.'));
    say('inspector', '');
    return;
  }
  const ends = new Map();
  for (const edge of drawn) {
    note(ends, edge.from, edge.source, edge.source_here);
    note(ends, edge.to, edge.destination, edge.destination_here);
  }
  const map = layout([...ends.keys()], drawn, width);
  // What is a little too wide is made smaller; what is much too wide is scrolled.
  const scale = Math.min(1, Math.max(SMALLEST, width / map.width));
  const svg = draw('svg', {
    width: map.width * scale, height: map.height * scale, viewBox: `0 0 ${map.width} ${map.height}`, role: 'group',
    'aria-label': `${many(ends.size, 'workload')}, ${many(drawn.length, 'connection')}`,
  });
  attach(drawn, map);
  // What needs attention comes first, and lies on top.
  for (const edge of drawn.toReversed()) svg.append(...edgeShapes(edge, map));
  for (const [id, end] of ends) svg.append(nodeShape(id, end, map.nodes.get(id), drawn));
  place.replaceChildren(svg);
  graph.volumes = new Map(drawn.map((edge) => [edgeKey(edge), volume(edge)]));
  graph.rest = [total > drawn.length ? `${many(total - drawn.length, 'pair')} not drawn.` : '',
    overflowed ? `${many(overflowed, 'connection')} counted without names: too many label sets.` : ''].join(' ');
  refocus(svg, drawn);
}

function note(ends, id, end, here) {
  const known = ends.get(id) ?? { end: end ?? nobody(id), here: false };
  known.here ||= here && end !== null;
  ends.set(id, known);
}

const edgeKey = (edge) => JSON.stringify([edge.from, edge.to, edge.protection]);

/** Gives every edge its own place at both boxes, in the order of what it leads to. */
function attach(edges, map) {
  const slots = (mine, other, slot) => {
    const groups = Map.groupBy(edges, (edge) => edge[mine]);
    for (const group of groups.values()) {
      group.sort((a, b) => map.nodes.get(a[other]).y - map.nodes.get(b[other]).y);
      const gap = Math.min(9, (BOX.height - 14) / group.length);
      group.forEach((edge, at) => { edge[slot] = (at - (group.length - 1) / 2) * gap; });
    }
  };
  slots('from', 'to', 'out');
  slots('to', 'from', 'in');
}

function edgeShapes(edge, map) {
  const [a, b] = [map.nodes.get(edge.from), map.nodes.get(edge.to)];
  const [x1, y1] = [a.x + BOX.width, a.y + edge.out];
  const [x2, y2] = [b.x - 7, b.y + edge.in];
  // An edge that runs back, or to itself, swings around the boxes.
  const back = x2 <= x1;
  const bend = back ? 70 : Math.max(36, (x2 - x1) * 0.45);
  const lift = back ? (y2 > y1 ? 1 : -1) * BOX.row * 0.9 : 0;
  const d = `M${x1} ${y1} C${x1 + bend} ${y1 + lift} ${x2 - bend} ${y2 - lift} ${x2} ${y2}`;
  const before = graph.volumes.get(edgeKey(edge));
  const busy = before !== undefined && before < volume(edge) ? ' busy' : '';
  const thickness = Math.min(4.5, 1.8 + Math.log10(1 + volume(edge) / 1000) * 0.45);
  const head = thickness + 3;
  const line = draw('path', { class: `edge ${kind(edge)}${busy}`, d, 'stroke-width': thickness });
  const arrow = draw('path', {
    class: `arrow edge-head ${kind(edge)}`, d: `M${x2 + 7} ${y2} l${-head * 1.6} ${-head} v${head * 2} z`,
  });
  const reach = draw('path', { class: 'reach', d });
  for (const shape of [line, arrow, reach]) shape.dataset.edge = edgeKey(edge);
  listen(reach, { edge: edgeKey(edge) });
  return [line, arrow, reach];
}

const pen = document.createElement('canvas').getContext('2d');

/** As much of a text as fits into a box. */
function short(text, font) {
  pen.font = `${font} ${getComputedStyle(document.body).fontFamily}`;
  const fits = (shown) => pen.measureText(shown).width <= BOX.width - 24;
  if (fits(text)) return text;
  let length = Math.min(text.length, 60);
  while (length > 1 && !fits(`${text.slice(0, length)}…`)) length -= 1;
  return `${text.slice(0, length)}…`;
}

function nodeShape(id, { end, here }, at, edges) {
  const y = at.y - BOX.height / 2;
  const bare = edges.some((edge) => edge.from === id && edge.protection === 'plaintext');
  const shape = draw('g', {
    class: `node${here ? ' here' : ''}${bare ? ' bare' : ''}`, tabindex: 0, role: 'img',
    'aria-label': `${end.workload}, ${end.namespace}: ${describeNode(id, edges)}`,
  },
  draw('rect', { x: at.x, y, width: BOX.width, height: BOX.height, rx: 9 }),
  draw('path', { class: 'stripe', d: `M${at.x + 9} ${y} h-1 a8 8 0 0 0 -8 9 v${BOX.height - 18} a8 8 0 0 0 8 9 h1 a9 9 0 0 1 -4 -9 v${18 - BOX.height} a9 9 0 0 1 4 -9 z` }),
  draw('text', { x: at.x + 15, y: at.y - 3 }, short(end.workload, '600 13px')),
  draw('text', { class: 'namespace', x: at.x + 15, y: at.y + 13 }, short(end.namespace, '11px')),
  draw('title', {}, `${end.workload}, ${end.namespace}`));
  shape.dataset.node = id;
  listen(shape, { node: id });
  return shape;
}

function listen(shape, focus) {
  const change = (to) => () => { graph.focus = to; graph.look(); };
  shape.addEventListener('pointerenter', change(focus));
  shape.addEventListener('pointerleave', change(null));
  shape.addEventListener('focus', change(focus));
  shape.addEventListener('blur', change(null));
}

function describeNode(id, edges) {
  const mine = edges.filter((edge) => edge.from === id || edge.to === id);
  const by = Map.groupBy(mine, kind);
  const words = [...by].map(([what, group]) => `${count(group.length)} ${what === 'refused' ? 'refused' : PROTECTIONS[what]}`);
  return words.join(', ');
}

function describeEdge(edge) {
  const opened = edge.opened ? `${many(edge.opened, 'connection')}, ${count(edge.open)} open` : 'no connection';
  const refused = edge.refused ? `, ${count(edge.refused)} refused` : '';
  const carried = volume(edge) ? `, ${bytes(edge.bytes_from_source)} there and ${bytes(edge.bytes_to_source)} back` : '';
  return `${PROTECTIONS[edge.protection]}; ${opened}${refused}${carried}`;
}

function refocus(svg, edges) {
  graph.look = () => {
    const focus = graph.focus;
    const lit = focus ? edges.filter((edge) => (focus.edge ? edgeKey(edge) === focus.edge : edge.from === focus.node || edge.to === focus.node)) : [];
    const keys = new Set(lit.map(edgeKey));
    const ends = new Set([focus?.node, ...lit.flatMap((edge) => [edge.from, edge.to])]);
    svg.classList.toggle('focused', lit.length > 0);
    for (const shape of svg.children) {
      shape.classList.toggle('lit', 'node' in shape.dataset ? ends.has(shape.dataset.node) && lit.length > 0 : keys.has(shape.dataset.edge));
    }
    describe(focus, lit, edges);
  };
  graph.look();
}

function describe(focus, lit, edges) {
  const inspector = byId('inspector');
  if (!lit.length) {
    inspector.replaceChildren(`Point at a workload or a line for its numbers. ${graph.rest}`);
  } else if (focus.edge) {
    const [edge] = lit;
    inspector.replaceChildren(make('b', {}, `${source(edge).workload} → ${destination(edge).workload}`), `  ${describeEdge(edge)}`);
  } else {
    const known = nobody(focus.node)?.workload ?? focus.node;
    inspector.replaceChildren(make('b', {}, known), `  ${describeNode(focus.node, edges)}`);
  }
}
