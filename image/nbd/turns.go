package nbd

// Whoever waits for replies needs somebody who reads them, and that is one at a
// time. Who is done with his own rests only while no call is active; so a call
// that is active, and finds somebody who reads, is safe. Who begins before his
// calls are active has to look once more when they are.

// begin makes the caller the one who reads replies, if nobody does.
func (c *conn) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reading || c.over {
		return false
	}
	c.reading = true
	return true
}

// claim is begin for who is about to send. What nobody has read since the last
// reply is looked at first: a server that has hung up meanwhile is to be noticed
// before a request is sent to it. Under c.wmu, which it may let go for that.
func (c *conn) claim() bool {
	if !c.begin() {
		return false
	}
	if err := c.idle.check(); err != nil {
		c.wmu.Unlock()
		c.end(hungUp(err, "in transmission"))
		c.wmu.Lock()
		return false
	}
	return true
}

// rest ends the caller's turn to read. If others still wait, or the connection
// has an end that nobody has found, it reports false, and the turn isn't over.
func (c *conn) rest() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.active > 0 || c.dead() {
		return false
	}
	c.reading = false
	return true
}

// read takes the replies off the connection until there is nothing to wait for,
// or until it ends.
func (c *conn) read() {
	for {
		if err := c.reply(); err != nil {
			c.end(hungUp(err, "in transmission"))
			return
		}
		if c.idle != nil && c.rest() {
			return
		}
	}
}

// readFor is read until calls are done. Whatever else is in flight by then is
// left to another goroutine.
func (c *conn) readFor(calls []*call) {
	if len(calls) == 0 { // nothing could be sent, so that there is an end to find
		c.read()
		return
	}
	for _, cl := range calls {
		for len(cl.done) == 0 {
			if err := c.reply(); err != nil {
				c.end(hungUp(err, "in transmission"))
				return
			}
		}
	}
	if !c.rest() {
		go c.read()
	}
}
