package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"nvstore.dev/tpmstate/control"
)

// The two ports of Microsoft's reference simulator (TPM 2.0 Library, part 4;
// ms-tpm-20-ref, TPMCmd/Simulator/src/TcpServer.c, TpmTcpProtocol.h), which
// tpm2-tss calls mssim: commands on one, power and cancel on the next.

const (
	simPowerOn       = 1
	simPowerOff      = 2
	simPhysPresOn    = 3
	simPhysPresOff   = 4
	simHashStart     = 5
	simHashData      = 6
	simHashEnd       = 7
	simSendCommand   = 8
	simCancelOn      = 9
	simCancelOff     = 10
	simNVOn          = 11
	simNVOff         = 12
	simHandshake     = 15
	simReset         = 17
	simRestart       = 18
	simSessionEnd    = 20
	simStop          = 21
	simServerVersion = 1
)

type simulator struct {
	e    *engine
	stop func()

	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

// listen serves both ports.
func (s *simulator) serve(l net.Listener, handle func(net.Conn) error) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				s.e.log.printf("error: simulator port: %v", err)
			}
			return
		}
		if !s.admit(conn) {
			conn.Close()
			continue
		}
		go func() {
			defer s.leave(conn)
			if err := handle(conn); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.e.log.printf("simulator port: %v", err)
			}
		}()
	}
}

// maxSimulator is how many clients may be connected: each holds a goroutine.
const maxSimulator = 64

func (s *simulator) admit(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) >= maxSimulator {
		return false
	}
	if s.conns == nil {
		s.conns = make(map[net.Conn]struct{})
	}
	s.conns[conn] = struct{}{}
	return true
}

func (s *simulator) leave(conn net.Conn) {
	conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, conn)
}

func (s *simulator) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
	}
}

func simWord(conn net.Conn) (uint32, error) {
	var b [4]byte
	_, err := io.ReadFull(conn, b[:])
	return binary.BigEndian.Uint32(b[:]), err
}

// next waits for a request's first word without limit, and for the rest of it
// not long.
func (s *simulator) next(conn net.Conn) (uint32, error) {
	conn.SetReadDeadline(time.Time{})
	w, err := simWord(conn)
	conn.SetReadDeadline(time.Now().Add(stallLimit))
	conn.SetWriteDeadline(time.Now().Add(stallLimit))
	return w, err
}

// commands serves the command port.
func (s *simulator) commands(conn net.Conn) error {
	for {
		req, err := s.next(conn)
		if err != nil {
			return err
		}
		var reply []byte
		switch req {
		case simHandshake:
			if _, err := simWord(conn); err != nil { // the client's version
				return err
			}
			reply = binary.BigEndian.AppendUint32(nil, simServerVersion)
			reply = binary.BigEndian.AppendUint32(reply, 0) // no TPM that can crash, no raw mode
		case simSendCommand:
			var head [5]byte
			if _, err := io.ReadFull(conn, head[:]); err != nil {
				return unexpected(err)
			}
			size := binary.BigEndian.Uint32(head[1:])
			if size < headerLen || size > 4096 {
				return fmt.Errorf("a command of %d bytes", size)
			}
			cmd := make([]byte, size)
			if _, err := io.ReadFull(conn, cmd); err != nil {
				return unexpected(err)
			}
			rsp := s.e.process(cmd, &head[0])
			reply = append(binary.BigEndian.AppendUint32(nil, uint32(len(rsp))), rsp...)
		case simSessionEnd:
			return nil
		case simStop:
			s.stop()
			return nil
		default:
			return fmt.Errorf("unknown request %d on the command port", req)
		}
		if _, err := conn.Write(append(reply, 0, 0, 0, 0)); err != nil {
			return err
		}
	}
}

// platform serves the platform port.
func (s *simulator) platform(conn net.Conn) error {
	for {
		req, err := s.next(conn)
		if err != nil {
			return err
		}
		r := control.Success
		switch req {
		case simPowerOn:
			if !s.e.Running() {
				r = s.e.Start(false)
			}
		case simPowerOff:
			s.e.Stop()
		case simReset, simRestart:
			r = s.e.Start(false)
		case simHashStart:
			r = s.e.HashStart()
		case simHashData:
			r, err = s.hashData(conn)
		case simHashEnd:
			r = s.e.HashEnd()
		case simCancelOn:
			r = s.e.Cancel()
		case simCancelOff, simNVOn, simNVOff, simPhysPresOn, simPhysPresOff:
			// Nothing to do: NV is there whenever the TPM is.
		case simSessionEnd:
			return nil
		case simStop:
			s.stop()
			return nil
		default:
			err = fmt.Errorf("unknown request %d on the platform port", req)
		}
		if err != nil {
			return err
		}
		if _, err := conn.Write(binary.BigEndian.AppendUint32(nil, uint32(r))); err != nil {
			return err
		}
	}
}

func (s *simulator) hashData(conn net.Conn) (control.Result, error) {
	n, err := simWord(conn)
	if err != nil {
		return 0, unexpected(err)
	}
	if n > 1<<20 {
		return 0, fmt.Errorf("%d bytes to measure", n)
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(conn, p); err != nil {
		return 0, unexpected(err)
	}
	return s.e.HashData(p), nil
}
