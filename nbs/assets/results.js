// What the pages of results do in a browser: tables that sort, and two pictures under a slider. Without scripts all numbers and pictures
// are there as well, in the order of the page.
(() => {
  'use strict'

  // --- Tables: a column whose cells carry a value sorts by it, others sort as text; what has no value stays at the end.

  const valueOf = (row, k) => {
    const cell = row.cells[k], value = cell.dataset.value
    return value === undefined ? cell.textContent.trim() : value === '' ? null : Number(value)
  }

  function sort(table, k, ascending) {
    const body = table.tBodies[0], rows = [...body.rows].map(row => [valueOf(row, k), row])
    const last = value => value === null || value === '' || value === '–'
    rows.sort(([a], [b]) => {
      if (last(a) || last(b)) return last(a) - last(b)
      const order = typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b), 'en', {numeric: true})
      return ascending ? order : -order
    })
    body.append(...rows.map(([, row]) => row))
    const heads = table.tHead.rows[0].cells
    for (const head of heads) head.removeAttribute('aria-sort')
    heads[k].setAttribute('aria-sort', ascending ? 'ascending' : 'descending')
  }

  for (const table of document.querySelectorAll('table.sortable')) {
    [...table.tHead.rows[0].cells].forEach((head, k) => {
      const button = document.createElement('button')
      button.type = 'button'
      button.append(...head.childNodes)
      head.append(button)
      button.addEventListener('click', () => sort(table, k, head.getAttribute('aria-sort') !== 'ascending'))
    })
  }

  // --- Pictures: the tiles of the table below know file, description and numbers; the slider shows any two of one photograph.

  for (const gallery of document.querySelectorAll('.gallery')) {
    const find = selector => gallery.querySelector(selector)
    const box = find('.box'), slide = find('.slide')
    const row = () => find(`tr[data-case="${find('input[type=radio]:checked').value}"]`)
    const select = side => find(`select[data-side=${side}]`)

    function show() {
      for (const side of ['left', 'right']) {
        const line = select(side).value
        const cell = [...row().querySelectorAll('.tile')].find(tile => tile.dataset.line === line).parentElement
        const from = cell.querySelector('.tile img'), image = box.querySelector(`img.${side}`)
        image.src = from.src
        image.alt = from.alt
        const score = cell.querySelector('.told span')
        box.querySelector(`output.${side}`).textContent = line === 'HQ' ? 'HQ' : `${line}\n${score.textContent}`
      }
      move()
    }

    function move() {
      box.style.setProperty('--at', `${slide.value}%`)
      slide.setAttribute('aria-valuetext', `${slide.value} % ${select('left').value}, the rest ${select('right').value}`)
    }

    function places(set) { // of the crops: one pair of sliders for all photographs, which starts where that photograph's crops are
      for (const input of gallery.querySelectorAll('input[data-axis]')) {
        const name = `--${input.dataset.axis}`
        if (set) row().style.setProperty(name, input.value / 100)
        else input.value = Math.round(100 * getComputedStyle(row()).getPropertyValue(name))
      }
    }

    slide.addEventListener('input', move)
    for (const side of ['left', 'right']) select(side).addEventListener('change', show)
    for (const radio of gallery.querySelectorAll('input[type=radio]')) radio.addEventListener('change', () => { show(); places(false) })
    for (const input of gallery.querySelectorAll('input[data-axis]')) input.addEventListener('input', () => places(true))
    for (const tile of gallery.querySelectorAll('.tile')) {
      tile.addEventListener('click', () => {
        find(`input[type=radio][value="${tile.closest('tr').dataset.case}"]`).checked = true
        select('right').value = tile.dataset.line
        show()
        places(false)
      })
    }
    show()
    places(false) // a browser may keep what a form held before the page was loaded again
  }
})()
