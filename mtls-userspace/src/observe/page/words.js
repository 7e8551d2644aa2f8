
// Numbers and times in, words for people out; and elements, whose text is never markup.

const SVG = 'http://www.w3.org/2000/svg';

function set(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Children that are strings become text. */
const make = (tag, attributes = {}, ...children) => set(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => set(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);
const say = (id, text) => { byId(id).textContent = text; };

const PROTECTIONS = {
  encrypted: 'mutual TLS',
  same_node: 'same node, authenticated',
  plaintext: 'plaintext',
  outside: 'leaves the mesh',
};

function count(n) {
  return Math.round(n).toLocaleString('en').replaceAll(',', '\u202f');
}

function many(n, one, more = `${one}s`) {
  return `${count(n)} ${n === 1 ? one : more}`;
}

function bytes(n) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB', 'PB'];
  let at = 0;
  while (n >= 999.5 && at < units.length - 1) { n /= 1000; at += 1; }
  return `${at && n < 99.95 ? n.toFixed(1) : Math.round(n)} ${units[at]}`;
}

/** The two largest units of a number of seconds. */
function duration(seconds) {
  const parts = [];
  let left = Math.max(0, Math.round(seconds));
  for (const [size, unit] of [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']]) {
    const n = Math.floor(left / size);
    left -= n * size;
    if (n || parts.length) parts.push(`${n} ${unit}`);
  }
  return parts.slice(0, 2).filter((part) => !part.startsWith('0 ')).join(' ') || '0 s';
}

const plural = (n, one, more) => (n === 1 ? one : more);
/** Who has no name, by the end of an edge that he stands at. */
const NOBODY = {
  from: { namespace: 'no workload known', workload: 'unnamed clients' },
  to: { namespace: 'no workload known', workload: 'elsewhere' },
};
const nobody = (key) => NOBODY[key.slice(1)];
const source = (edge) => edge.source ?? NOBODY.from;
const destination = (edge) => edge.destination ?? NOBODY.to;
/** Unlike every workload's, the keys of nobody have no name after the namespace. */
const key = (end, role) => (end ? `${end.namespace}/${end.workload}` : `/${role}`);
/** Whether nothing but refusals happened. */
const refusedOnly = (edge) => edge.refused > 0 && edge.opened === 0 && edge.open === 0;
const volume = (edge) => edge.bytes_from_source + edge.bytes_to_source;
const kind = (edge) => (refusedOnly(edge) ? 'refused' : edge.protection);
