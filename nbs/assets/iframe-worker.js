// A page that was opened from the disk may not start a worker, and the theme's search is one. There, a hidden frame does its work:
// it runs the same script, and messages go to and fro. Served pages keep real workers.
if (location.protocol === 'file:') {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement('iframe')
      this.frame.hidden = true
      this.frame.title = 'search'
      this.ready = new Promise(resolve => { this.loaded = resolve })
      const start = () => {
        document.body.append(this.frame)
        const inside = this.frame.contentWindow
        inside.postMessage = data => this.dispatchEvent(new MessageEvent('message', {data}))
        inside.importScripts = (...urls) => Promise.all(urls.map(src => this.run(src)))
        this.run(url).then(this.loaded)
      }
      document.body ? start() : addEventListener('DOMContentLoaded', start)
    }

    run(url) {
      return new Promise((resolve, reject) => {
        const script = this.frame.contentDocument.createElement('script')
        Object.assign(script, {src: url, onload: resolve, onerror: reject})
        this.frame.contentDocument.head.append(script)
      })
    }

    postMessage(data) { this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent('message', {data}))) }
    terminate() { this.frame.remove() }
  }
}
