// Package testserver takes the place of k8s.io/apiserver/pkg/storage/etcd3/testserver, whose etcd
// is built in: here each test starts the program that STORE names, with etcd's flags; MEMBERS of
// them make a cluster.
package testserver

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"
	storagetesting "k8s.io/apiserver/pkg/storage/testing"
)

var ports sync.Mutex

var members []*member // Of the latest RunEtcd.

func NewTestConfig(t testing.TB) *embed.Config {
	return embed.NewConfig()
}

type member struct {
	endpoint string
	flags    []string
	log      *os.File
	process  *exec.Cmd
}

func (m *member) start(t testing.TB) {
	m.process = exec.Command(os.Getenv("STORE"), m.flags...)
	m.process.Stdout, m.process.Stderr = m.log, m.log
	if err := m.process.Start(); err != nil {
		t.Fatal(err)
	}
}

func (m *member) stop() {
	m.process.Process.Kill()
	m.process.Wait()
}

// RunEtcd starts the members with what the tests set in cfg, and returns a client of them.
func RunEtcd(t testing.TB, cfg *embed.Config) *kubernetes.Client {
	t.Helper()
	if cfg == nil {
		cfg = NewTestConfig(t)
	}
	folder := t.TempDir()
	log, err := os.Create(filepath.Join(folder, "log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if text, _ := os.ReadFile(log.Name()); t.Failed() && len(text) > 0 {
			t.Logf("the store says: %s", text)
		}
	})
	endpoints := start(t, cfg, folder, log)
	client, err := kubernetes.New(clientv3.Config{
		Endpoints:   endpoints,
		DialTimeout: 60 * time.Second,
		DialOptions: []grpc.DialOption{grpc.WithBlock()},
	})
	if err != nil {
		t.Fatal(err)
	}
	for { // Once a read is answered, there is a leader.
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		_, err := client.KV.Get(ctx, "/")
		cancel()
		if err == nil {
			break
		}
	}
	client.KV = storagetesting.NewKVRecorder(client.KV)
	client.Kubernetes = storagetesting.NewKubernetesRecorder(client.Kubernetes)
	return client
}

func start(t testing.TB, cfg *embed.Config, folder string, log *os.File) []string {
	ports.Lock() // Until they listen, others may be given the same ports.
	defer ports.Unlock()
	count, _ := strconv.Atoi(os.Getenv("MEMBERS"))
	count = max(count, 1)
	members = nil
	var endpoints, cluster, peers []string
	for number := range count {
		client, peer := freeURL(t), freeURL(t)
		endpoints, peers = append(endpoints, client), append(peers, peer)
		cluster = append(cluster, fmt.Sprintf("m%d=%s", number, peer))
	}
	for number, endpoint := range endpoints {
		m := &member{endpoint: endpoint, log: log, flags: []string{
			fmt.Sprintf("--name=m%d", number),
			"--data-dir=" + filepath.Join(folder, strconv.Itoa(number)),
			"--listen-client-urls=" + endpoint,
			"--advertise-client-urls=" + endpoint,
			"--listen-peer-urls=" + peers[number],
			"--initial-advertise-peer-urls=" + peers[number],
			"--initial-cluster=" + strings.Join(cluster, ","),
			"--log-level=error",
		}}
		if interval := cfg.ExperimentalWatchProgressNotifyInterval; interval > 0 {
			m.flags = append(m.flags,
				"--experimental-watch-progress-notify-interval="+interval.String())
		}
		m.start(t)
		members = append(members, m)
		t.Cleanup(m.stop)
	}
	for _, m := range members {
		address := strings.TrimPrefix(m.endpoint, "http://")
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			connection, err := net.Dial("tcp", address)
			if err == nil {
				connection.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	return endpoints
}

// KillLeader kills the member that leads, with SIGKILL.
func KillLeader(t testing.TB, client *kubernetes.Client) {
	for _, m := range members {
		status, err := client.Status(context.Background(), m.endpoint)
		if err == nil && status.Leader == status.Header.MemberId {
			m.stop()
			return
		}
	}
	t.Fatal("there is no leader")
}

// StartKilled starts the killed members again.
func StartKilled(t testing.TB) {
	for _, m := range members {
		if m.process.ProcessState != nil {
			m.start(t)
		}
	}
}

func freeURL(t testing.TB) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return "http://" + listener.Addr().String()
}
