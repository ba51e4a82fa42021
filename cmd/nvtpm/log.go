package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// A logger writes lines. Level 0 is what goes wrong, 1 what happens, and 5 and
// above each command, as swtpm's.
type logger struct {
	mu     sync.Mutex
	w      io.Writer // nil: nothing is logged
	level  int
	prefix string
	stamp  bool
}

func (l *logger) printf(format string, args ...any) { l.write(0, format, args...) }
func (l *logger) infof(format string, args ...any)  { l.write(1, format, args...) }
func (l *logger) debugf(format string, args ...any) { l.write(5, format, args...) }

func (l *logger) write(level int, format string, args ...any) {
	if l == nil || l.w == nil || level > l.level {
		return
	}
	// One line, whatever an error or a peer has in it.
	text := strings.NewReplacer("\n", "; ", "\r", " ").Replace(fmt.Sprintf(format, args...))
	l.mu.Lock()
	defer l.mu.Unlock()
	stamp := ""
	if l.stamp {
		stamp = time.Now().UTC().Format("2006-01-02T15:04:05.000Z ")
	}
	fmt.Fprintf(l.w, "%s%s%s\n", stamp, l.prefix, text)
}
